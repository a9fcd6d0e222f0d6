"""Speed: firth against the same work in other programs, or a part of firth alone."""
