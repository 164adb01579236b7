"use strict";
// The first script of the page. Scripts of data call put(name, value), whenever they come; libraries that were written
// for CommonJS are wrapped in define().
// eslint-disable-next-line no-var -- it must be a property of window, for scripts that come later
var dataflowReport = {
  values: new Map(),
  put(name, value) {
    this.values.set(name, value);
  },
  modules: new Map(),
  define(name, body) {
    const module = { exports: {} };
    body(module.exports, (other) => this.modules.get(other.replace("./", "")), module, { env: { NODE_ENV: "production" } });
    this.modules.set(name, module.exports);
  },
};
