"""`python -m phi2.losses > docs/losses.md`: the table of the losses in the registry."""

from phi2.losses.registry import document

if __name__ == "__main__":
    print(document(), end="")
