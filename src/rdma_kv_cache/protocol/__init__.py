# SPDX-License-Identifier: Apache-2.0
"""Messages that processes of one job exchange: msgpack structs, framing and signatures.

Nothing is ever unpickled. Every decode is typed, so bytes of another shape raise `ProtocolError`.
"""
