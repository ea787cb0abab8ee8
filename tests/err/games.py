class Guess:
    def __init__(self, highest=9):
        self.highest = highest

    def reset(self, demonstration, **columns):
        self.secret = demonstration

    def reply(self, text):
        return None if text == self.secret else "Another."


class Silent:
    def reset(self, **columns):
        pass


class Shop:
    def reset(self, **columns):
        return "It is open."

    def buy(self, count):
        """Buys apples."""
        return str(count)

    def sell(self, count: int):
        return str(count)

    def sell(self, count: int):  # noqa: F811
        """Sells apples.

        Args:
            count: how many
        """
        return str(count)


class Open:
    def reset(self, **columns):
        return "It is open."

    def reply(self, text):
        return None


class Kiosk:
    def reset(self, **columns):
        pass

    def ask(self, price: str):
        """Asks for a price.

        Args:
            price: of what
        """
        return "3"
