"""Attack the package with odd input, damage, full disks, hostile servers and kills."""
