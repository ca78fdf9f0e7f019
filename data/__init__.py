"""Scripts that prepare a data set in the course's own form."""
