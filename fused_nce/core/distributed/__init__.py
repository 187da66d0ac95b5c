"""Keys of several processes: entered only by a call that is given a group."""
