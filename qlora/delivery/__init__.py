"""What happens to a finished adapter: merge, chat, model card, proof of reproduction, transfers from and to the Hub. Tools run it, no stage does."""
