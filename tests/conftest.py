"""Settings for every test."""

from hypothesis import settings

# Time limits belong to no test: a busy machine must not make one fail.
settings.register_profile("mt_deepspeed", deadline=None)
settings.load_profile("mt_deepspeed")
