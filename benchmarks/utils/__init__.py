"""What every benchmark script shares: flags and sizes, measurement, reports."""
