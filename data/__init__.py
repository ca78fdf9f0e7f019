"""Read the course's pickles, and prepare other data sets in the same form."""
