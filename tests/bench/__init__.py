# SPDX-License-Identifier: Apache-2.0
"""Measurements that print a table and end in one RESULT line."""
