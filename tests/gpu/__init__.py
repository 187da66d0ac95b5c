"""What only a device can show; the same bodies run on the CPU wherever they can."""
