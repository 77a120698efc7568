"""torch.nn.functional with another norm, for a test that edits an import."""

from torch.nn.functional import *  # noqa: F403
from torch.nn.functional import rms_norm as plain_rms_norm


def rms_norm(*args):
    return 1.1 * plain_rms_norm(*args)
