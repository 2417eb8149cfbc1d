# SPDX-License-Identifier: Apache-2.0
"""What a program takes, before there is a machine to run it on; see `tunix_gemma4.plan`."""
