"""Bytes to trees and back: checkpoints and adapters in the formats that other programs read and write."""
