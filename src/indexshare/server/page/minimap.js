// A narrow picture of the whole document beside it: where the lit places are and which part is on screen.

const WIDTH = 26;

export class Minimap {
  #canvas;
  #pane;
  #marks = []; // [top, bottom, level] as shares of the height

  /** `pane` is the element that scrolls. */
  constructor(canvas, pane) {
    this.#canvas = canvas;
    this.#pane = pane;
    pane.addEventListener("scroll", () => requestAnimationFrame(() => this.draw()), { passive: true });
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    const scroll = (event) => {
      if (event.buttons !== 1) return;
      const share = event.offsetY / canvas.clientHeight;
      pane.scrollTop = share * pane.scrollHeight - pane.clientHeight / 2;
    };
    canvas.addEventListener("pointerdown", scroll);
    canvas.addEventListener("pointermove", scroll);
  }

  set marks(marks) {
    this.#marks = marks;
    this.draw();
  }

  draw() {
    const ratio = devicePixelRatio;
    const height = this.#canvas.clientHeight;
    if (!height) return;
    this.#canvas.width = WIDTH * ratio;
    this.#canvas.height = height * ratio;
    const context = this.#canvas.getContext("2d");
    context.scale(ratio, ratio);
    const colors = [...document.querySelectorAll(".swatch")].map((swatch) => getComputedStyle(swatch).backgroundColor);
    // Strong marks last, so that weak ones beside them do not hide them.
    for (const [top, bottom, level] of this.#marks.toSorted((a, b) => a[2] - b[2])) {
      context.fillStyle = colors[level - 1];
      context.fillRect(5, top * height, WIDTH - 10, Math.max(2, (bottom - top) * height));
    }
    const { scrollTop, scrollHeight, clientHeight } = this.#pane;
    context.strokeStyle = getComputedStyle(this.#canvas).color;
    context.lineWidth = 1.5;
    context.beginPath();
    context.roundRect(1, (scrollTop / scrollHeight) * height + 1, WIDTH - 2, Math.max(6, (clientHeight / scrollHeight) * height - 2), 3);
    context.stroke();
  }
}
