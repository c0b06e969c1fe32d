# SPDX-License-Identifier: Apache-2.0
"""The engine over real kernel verbs, in guests with Soft-RoCE."""
