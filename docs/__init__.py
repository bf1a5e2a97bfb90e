"""What builds the site, and takes the outputs that the pages show."""
