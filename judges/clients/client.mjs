// Connects to localhost over TLS by Node, and prints what became of it.
//
//   client.mjs PORT CA_FILE
//
// Exit code 0: connected and verified; 1: refused, with the reason.
import { readFileSync } from "node:fs";
import { connect } from "node:tls";

const [port, caFile] = process.argv.slice(2);
const socket = connect({ host: "localhost", servername: "localhost", port: Number(port), ca: readFileSync(caFile) });
socket.setTimeout(20000, () => socket.destroy(new Error("timed out")));
socket.on("secureConnect", () => {
  console.log("connected", socket.getProtocol());
  socket.destroy();
});
socket.on("error", (error) => {
  console.error(`refused: ${error.code ?? ""} ${error.message}`);
  process.exit(1);
});
