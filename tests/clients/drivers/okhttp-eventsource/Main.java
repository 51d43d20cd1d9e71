import com.launchdarkly.eventsource.EventSource;
import com.launchdarkly.eventsource.MessageEvent;
import com.launchdarkly.eventsource.background.BackgroundEventHandler;
import com.launchdarkly.eventsource.background.BackgroundEventSource;
import java.net.URI;

/** okhttp-eventsource in the background, as its documentation has it: it reconnects by itself. */
public class Main {
  static synchronized void say(String event, String id, String data, String more) {
    StringBuilder line = new StringBuilder("{\"event\":").append(quote(event));
    line.append(",\"id\":").append(quote(id)).append(",\"data\":").append(quote(data));
    System.out.println(line.append(more).append("}"));
    System.out.flush();
  }

  static String quote(String text) {
    return text == null ? "null" : "\"" + text.replace("\\", "\\\\").replace("\"", "\\\"").replace("\n", "\\n").replace("\r", "\\r") + "\"";
  }

  public static void main(String[] args) throws Exception {
    BackgroundEventHandler handler = new BackgroundEventHandler() {
      public void onOpen() {
        say("open", null, null, "");
      }

      public void onClosed() {
        say("error", null, null, "");
      }

      public void onMessage(String event, MessageEvent message) {
        boolean known = event.equals("message") || event.equals("gap");
        say(known ? event : "other", message.getLastEventId(), message.getData(), known ? "" : ",\"name\":" + quote(event));
      }

      public void onComment(String comment) {}

      public void onError(Throwable error) {
        say("error", null, String.valueOf(error), "");
      }
    };
    EventSource.Builder source = new EventSource.Builder(URI.create(args[0]));
    if (args.length > 1) {
      source.lastEventId(args[1]);
    }
    BackgroundEventSource background = new BackgroundEventSource.Builder(handler, source).build();
    background.start();
    Thread.currentThread().join();
  }
}
