"""Everything about many processes: accelerate, DDP, FSDP2, and what the processes agree on."""
