"""What several steps share: the data, the net, figures, and how a script behaves."""
