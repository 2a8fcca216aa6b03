"""TPU VMs by queued resources: one slice or several, on demand or spot."""
