# SPDX-License-Identifier: Apache-2.0
"""What touches Tunix, and nothing else does."""

from .version import require

require()
