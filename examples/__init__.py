"""A model repository with two versions of a digits classifier, unseen digits, and how they were made."""
