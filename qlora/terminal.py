"""Text from data, models and file names, as a terminal may show it."""


def visible(text: str) -> str:
    """The text with what would steer a terminal spelled out: escape sequences, direction marks, half characters."""
    return "".join(character if character.isprintable() or character in "\n\t" else f"\\x{ord(character):02x}" for character in text)
