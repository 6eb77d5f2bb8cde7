"""What bench/ssh and bench/failover share."""
