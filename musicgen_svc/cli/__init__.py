"""The command line. None of it runs inside Cog's worker, and none of it needs torch."""
