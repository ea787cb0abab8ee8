"""A server that speaks OpenEnv's protocol, for tests: one number game for each web socket, and the schema over HTTP."""

import contextlib
import http
import json
import threading

from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Response
from websockets.sync.server import serve

SAY = {"properties": {"metadata": {"type": "object"}, "text": {"type": "string"}}, "required": ["text"]}
MOVE = {"properties": {"number": {"type": "integer"}, "fast": {"type": "boolean"}}, "required": ["number"]}


class OpenEnvServer:
    """Serves the game on a free port of this machine; `resets` are the data that sessions began with."""

    def __init__(self, action=SAY, sessions=64):
        self.action, self.sessions, self.resets, self.open = action, sessions, [], 0
        self._server = serve(self._play, "127.0.0.1", 0, process_request=self._answer)
        self.url = f"http://127.0.0.1:{self._server.socket.getsockname()[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()

    def _answer(self, connection, request):
        if request.path != "/schema":
            return None
        body = json.dumps({"action": self.action}).encode()
        return Response(http.HTTPStatus.OK, "OK", Headers({"Content-Length": str(len(body))}), body)

    def _play(self, socket):
        self.open += 1
        try:
            if self.open > self.sessions:
                error = {"message": "Server at capacity", "code": "CAPACITY_REACHED"}
                socket.send(json.dumps({"type": "error", "data": error}))
                return
            with contextlib.suppress(ConnectionClosed):
                self._serve(socket)
        finally:
            self.open -= 1

    def _serve(self, socket):
        secret = ""
        for line in socket:
            message = json.loads(line)
            data = message.get("data", {})
            if message["type"] == "close":
                return
            if message["type"] == "reset":
                self.resets.append(data)
                secret = data.get("secret", "5")
                answer = self._observation("Guess.", None, False)
            else:
                answer = self._step(data, secret)
            socket.send(json.dumps(answer))

    def _step(self, action, secret):
        if missing := [name for name in self.action["required"] if name not in action]:
            errors = [{"loc": [name], "msg": "Field required"} for name in missing]
            return {"type": "error", "data": {"message": "Invalid", "code": "VALIDATION_ERROR", "errors": errors}}
        said = str(action.get("text", action.get("number")))
        if said == "boom":
            return {"type": "error", "data": {"message": "exploded", "code": "EXECUTION_ERROR"}}
        right = said == secret
        return self._observation("Right." if right else "Wrong.", float(right), right)

    def _observation(self, said, reward, done):
        return {"type": "observation", "data": {"observation": {"said": said}, "reward": reward, "done": done}}
