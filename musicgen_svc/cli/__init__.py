"""The command line's side of the service: none of it runs inside Cog's worker, and none of it needs torch."""
