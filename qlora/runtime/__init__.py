"""Where processes run, who waits for whom, what is logged. All stages run it and none depends on it: it can't change a byte of an output."""
