import { defineConfig } from "vite";

// `npm run dev` serves the page itself and passes the API on to a server that runs beside it.
const server = process.env.KVIST_URL ?? "http://127.0.0.1:8000";

export default defineConfig({
  base: "./",
  build: {
    outDir: "../src/kvist/server/static",
    emptyOutDir: true,
    target: "es2022",
    modulePreload: { polyfill: false },
    assetsInlineLimit: 0, // the page's policy allows no inline code
    reportCompressedSize: false,
  },
  server: { proxy: { "/v1": server } },
});
