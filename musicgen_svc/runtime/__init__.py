"""What requests share while they run: queues, progress, random state, threads and files."""
