"""The number game: a secret from 1 to 9, and after each wrong guess "higher" or "lower"."""


class Guess:
    def reset(self, demonstration, **columns):
        self.secret = int(demonstration)

    def reply(self, text):
        """The next user turn, or None once the number is found; with the turn's reward."""
        guess = int(text) if text.strip().isdecimal() else 0
        if guess == self.secret:
            return None, 1.0
        return ("higher" if guess < self.secret else "lower"), 0.0
