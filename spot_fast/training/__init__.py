"""One step (`step`), the loop around it (`trainer`), and what the two stand on."""
