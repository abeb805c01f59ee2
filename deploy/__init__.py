"""A real federation: keys and certificates, the folders of a server and of a site, their checks and their start."""
