"""The real thing: `rewardserve serve` as a process of its own, with tiny random checkpoints and real texts."""

from real_server import bf16_checkpoint, checkpoint, kit, real_groups, start

__all__ = ["bf16_checkpoint", "checkpoint", "kit", "real_groups", "start"]
