"""Checkpoints of the adapted draft: the manifest, the atomic store on disk, and the verified in-place swap."""
