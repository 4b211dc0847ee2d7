"""Stream text from a web handler of your own. (`spotlight serve` is a whole server: batching, OpenAI's API, metrics.)

pip install 'spotlight-jax[serve]'
python examples/stream_web.py [runs/demo]
curl -N http://127.0.0.1:8080/continue -d 'Once upon a time'
"""

import sys
import threading

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from spotlight_jax import GenerateConfig, InputError, load_model, load_selector, make_engine, stream


def make_app(model, selector=None, cfg=GenerateConfig(max_new_tokens=64)):  # noqa: B008 (frozen)
    """Return an app that continues the text of a POST, piece by piece as the model writes it."""
    engine = make_engine(model, cfg, selector)  # compiled once, for all requests
    one_at_a_time = threading.Lock()

    def pieces(prompt):
        """Yield text; starlette runs this in a thread of its own, so that other requests are answered meanwhile."""
        with one_at_a_time:
            yield from stream(model, prompt, cfg, selector, engine)

    async def continue_text(request: Request):
        """Answer with text, or with the one line that says what is wrong with the prompt."""
        try:
            prompt = (await request.body()).decode("utf-8")
            if len(model.tokenizer(prompt).input_ids) + cfg.max_new_tokens > model.cfg.max_context:
                raise InputError(f"the prompt does not fit into the model's {model.cfg.max_context} tokens; shorten it")
            if not prompt:
                raise InputError("the prompt is empty; send a text")
        except (InputError, UnicodeDecodeError) as error:
            return PlainTextResponse(f"{error}\n", status_code=400)
        return StreamingResponse(pieces(prompt), media_type="text/plain; charset=utf-8")

    return Starlette(routes=[Route("/continue", continue_text, methods=["POST"])])


if __name__ == "__main__":
    import uvicorn

    selector = load_selector(sys.argv[1]) if len(sys.argv) > 1 else None
    model = load_model("smollm2-135m" if selector is None else selector.base_model)
    uvicorn.run(make_app(model, selector), host="127.0.0.1", port=8080)
