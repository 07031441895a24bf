"""rewardserve: a gRPC server for the reward models of RLHF. The client is in `rewardserve.client`."""

__version__ = "0.1.0"
