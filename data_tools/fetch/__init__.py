"""Downloads the pictures of a table of links into the raw layout that `convert` reads.

Why not img2dataset (1.47, looked at in its source): it writes layouts of its own (which `convert img2dataset`
reads), follows links and redirects to any address, reads bodies without a limit, knows no politeness towards a
single host, and needs pandas < 3, albumentations < 2, webdataset < 0.3 and wandb. The standard library does.
"""
