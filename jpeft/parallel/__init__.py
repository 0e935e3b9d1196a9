"""How a tree lies on devices: sharding, and what is kept in the host's memory."""
