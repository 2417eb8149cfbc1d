# SPDX-License-Identifier: Apache-2.0
"""What `make demo` and `make demo-rl` run."""
