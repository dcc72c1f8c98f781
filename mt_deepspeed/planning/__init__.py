"""What a run will need, told before it starts: memory, speed, data rate, disk, time."""
