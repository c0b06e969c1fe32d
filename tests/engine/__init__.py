# SPDX-License-Identifier: Apache-2.0
"""The native engine between two real processes."""
