"""The fixtures that tests of the studies share with those of the package."""

from tests.conftest import cifar10_root, data_root  # noqa: F401
