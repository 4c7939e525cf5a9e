{{- /* A workload of deploy/kubernetes with this release's image and settings. Arguments: root, file, settings */ -}}
{{- define "sennit.workload" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
{{- $object := $root.Files.Get .file | fromYaml -}}
{{- $_ := set $object.metadata "namespace" $root.Release.Namespace -}}
{{- $_ := set $object.metadata.labels "app.kubernetes.io/instance" $root.Release.Name -}}
{{- $_ := set $object.metadata.labels "app.kubernetes.io/managed-by" $root.Release.Service -}}
{{- $_ := set $object.metadata.labels "helm.sh/chart" (printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-") -}}
{{- $pod := $object.spec.template.spec -}}
{{- $container := first $pod.containers -}}
{{- with .settings.patch -}}
{{- $patch := ($root.Files.Get . | fromYaml).spec.template.spec -}}
{{- $_ := set $pod "initContainers" (concat $patch.initContainers ($pod.initContainers | default list)) -}}
{{- $_ := set $pod "volumes" (concat $pod.volumes $patch.volumes) -}}
{{- end -}}
{{- $tag := $values.image.tag | default ($root.Chart.AppVersion | replace "+" "-") -}}
{{- range concat $pod.containers ($pod.initContainers | default list) -}}
{{- $_ := set . "image" (printf "%s:%s" $values.image.repository $tag) -}}
{{- $_ := set . "imagePullPolicy" $values.image.pullPolicy -}}
{{- end -}}
{{- with $values.imagePullSecrets }}{{ $_ := set $pod "imagePullSecrets" . }}{{ end -}}
{{- with .settings.resources }}{{ $_ := set $container "resources" . }}{{ end -}}
{{- with .settings.replicas }}{{ $_ := set $object.spec "replicas" . }}{{ end -}}
{{- if eq $object.kind "DaemonSet" -}}
{{- $_ := set $pod "tolerations" $values.agent.tolerations -}}
{{- $_ := set $pod "nodeSelector" (merge (dict) $pod.nodeSelector $values.agent.nodeSelector) -}}
{{- end -}}
{{- if .settings.backend -}}
{{- range $container.env }}{{ if eq .name "SENNIT_BACKEND" }}{{ $_ := set . "value" $values.wireguard.backend }}{{ end }}{{ end -}}
{{- end -}}
{{- if and .settings.api $values.api.host -}}
{{- $host := dict "name" "KUBERNETES_SERVICE_HOST" "value" $values.api.host -}}
{{- $port := dict "name" "KUBERNETES_SERVICE_PORT" "value" ($values.api.port | toString) -}}
{{- range concat $pod.containers ($pod.initContainers | default list) -}}
{{- $_ := set . "env" (concat (.env | default list) (list $host $port)) -}}
{{- end -}}
{{- end -}}
{{- with .settings.annotations }}{{ $_ := set $object.spec.template.metadata "annotations" . }}{{ end -}}
{{ toYaml $object }}
{{- end -}}

{{- define "sennit.configuration" -}}
{{- $kube := dict -}}
{{- with .Values.cluster }}{{ $_ := set $kube "cluster" . }}{{ end -}}
{{- if not (kindIs "invalid" .Values.oldSiteLabel) }}{{ $_ := set $kube "oldSiteLabel" .Values.oldSiteLabel }}{{ end -}}
{{- $wireguard := dict "externalDevice" true -}}
{{- range $key, $value := .Values.wireguard }}{{ if not (kindIs "invalid" $value) }}{{ $_ := set $wireguard $key $value }}{{ end }}{{ end -}}
{{- $own := dict "mesh" .Values.mesh "site" .Values.site "registry" (dict "kube" $kube) "wireguard" $wireguard -}}
{{- with .Values.sites }}{{ $_ := set $own "sites" . }}{{ end -}}
{{- with .Values.protectedAddresses }}{{ $_ := set $own "protectedAddresses" . }}{{ end -}}
{{ toYaml (mergeOverwrite $own .Values.config) }}
{{- end -}}
