"""Some of these import Locust, which would patch the standard library for all tests of this process. Not for long: a Locust
that a test starts is to be patched."""

import os

os.environ["LOCUST_SKIP_MONKEY_PATCH"] = "1"
import locust  # noqa: F401

del os.environ["LOCUST_SKIP_MONKEY_PATCH"]
