"""What to start, wait for, evict or refuse: decided here, all of it pure, and carried out elsewhere."""
