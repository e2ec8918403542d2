"""Devices beside the CPU, on which loads run: execution providers, and their devices' memory."""
