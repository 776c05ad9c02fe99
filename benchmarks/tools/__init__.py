"""What every benchmark measures with: time in interleaved rounds, peak memory, the machine."""
