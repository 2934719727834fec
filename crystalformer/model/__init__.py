"""The Crystalformer: batches of crystals in, properties out."""
