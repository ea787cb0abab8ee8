class Guess:
    def __init__(self, highest=9):
        self.highest = highest

    def reset(self, demonstration, **columns):
        self.secret = demonstration

    def reply(self, text):
        return None if text == self.secret else "Another."


class Shop:
    def reset(self, **columns):
        return "It is open."

    def buy(self, count: int) -> str:
        """Buys apples.

        Args:
            count: how many
        """
        return str(count)
