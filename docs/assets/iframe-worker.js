// Search in pages that were opened from disk, where browsers start no worker: a hidden frame does the worker's job.
if (location.protocol === "file:") {
  const inFrame = () => {
    const load = (url) =>
      new Promise((resolve, reject) => {
        const script = document.createElement("script");
        Object.assign(script, { src: url, onload: resolve, onerror: reject });
        document.head.append(script);
      });
    self.importScripts = (...urls) => urls.reduce((before, url) => before.then(() => load(url)), Promise.resolve());
    self.postMessage = (data) => frameElement.worker.dispatchEvent(new MessageEvent("message", { data }));
  };
  self.IFrameWorker = self.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = Object.assign(document.createElement("iframe"), { hidden: true, worker: this });
      this.ready = new Promise((resolve) => this.frame.addEventListener("load", resolve));
      const script = Object.assign(document.createElement("script"), { src: url });
      this.frame.srcdoc = `<script>(${inFrame})()</script>${script.outerHTML}`;
      document.body.append(this.frame);
    }
    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
